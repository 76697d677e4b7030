"""Certificates as files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import trustme


def write_certificates(
    folder: Path, hosts: Mapping[str, Collection[str]], strangers: Collection[str] = ()
) -> Path:
    """Write an authority's `ca.pem`, and `NAME.pem` and `NAME.key` for each name; the folder.

    Args:
        folder: is there.
        hosts: what each certificate is for: host names, addresses, or a mail address.
        strangers: names whose certificates another authority signs.
    """
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    for name, identities in hosts.items():
        certificate = (other if name in strangers else ca).issue_cert(*identities)
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
        (folder / f"{name}.pem").write_bytes(chain)
    return folder

"""From a request's bytes to `Features`: parsing, decoding, resizing, tokenizing."""

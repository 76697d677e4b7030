"""Turn a checkpoint into a Triton model repository: `triward-server export`."""

from triward_server.export.commands import application

app = application("export", "export/build_repository.py")

if __name__ == "__main__":
    app()

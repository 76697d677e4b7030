"""Turn a checkpoint into a Triton model repository: `triward-server export`."""

from triward_server.export.commands import application, export

app = application(export)

if __name__ == "__main__":
    app()

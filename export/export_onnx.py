"""Write a vision tower and a value head as ONNX graphs: `triward-server export-onnx`."""

from triward_server.export.commands import application

app = application("export-onnx", "export/export_onnx.py")

if __name__ == "__main__":
    app()

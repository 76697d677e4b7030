"""Write a vision tower and a value head as ONNX graphs: `triward-server export-onnx`."""

from triward_server.export.commands import application, export_onnx

app = application(export_onnx)

if __name__ == "__main__":
    app()

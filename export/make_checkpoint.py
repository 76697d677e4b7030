"""Write a checkpoint with random weights: `triward-server make-checkpoint`."""

from triward_server.export.commands import application

app = application("make-checkpoint", "export/make_checkpoint.py")

if __name__ == "__main__":
    app()

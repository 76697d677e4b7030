"""Write a checkpoint with random weights: `triward-server make-checkpoint`."""

from triward_server.export.commands import application, make_checkpoint

app = application(make_checkpoint)

if __name__ == "__main__":
    app()

"""A web page that scores what is typed and dropped into it: `triward playground`."""

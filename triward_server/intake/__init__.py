"""A request's bytes -> `Features`: parsing, decoding, resizing, tokenizing."""

"""In flash-attn's place, for imports: no attention is computed."""

"""In DeepSpeed's place, for imports: no model of OpenRLHF's is made."""

__version__ = "0.19.6"

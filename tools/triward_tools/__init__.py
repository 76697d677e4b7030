"""Evaluation, selection and batch jobs with a Triward server's rewards.

`evaluation` scores public benchmarks, `selection` chooses, filters and pairs responses, `offline`
and `ray` score Parquet files. Installed, it adds its commands to `triward`.
"""

__version__ = "0.2.0"

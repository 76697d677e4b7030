"""HTTP doors that trainers know, in front of a Triward server: `triward gateway`."""

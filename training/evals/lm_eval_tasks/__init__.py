"""Tasks of lm_eval that read files of a folder of the user's."""

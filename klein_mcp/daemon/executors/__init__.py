"""Where jobs are computed: one file per executor."""

"""Config files for `streamt1 generate --config`: one `get_config()` each, with keys the program uses and no others."""

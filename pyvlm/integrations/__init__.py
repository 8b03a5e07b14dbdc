"""How pyvlm plugs into other libraries."""

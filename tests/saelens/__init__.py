"""What SAELens makes of an export, in an environment of its own: SAELens pins another TransformerLens."""

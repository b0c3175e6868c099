"""Model families over one decoder."""

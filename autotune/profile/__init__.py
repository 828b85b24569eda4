"""Where each byte of one step goes."""

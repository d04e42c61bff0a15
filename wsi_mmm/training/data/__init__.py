"""PORT Source: what training draws from. `base` holds the port; one module per kind of data set."""

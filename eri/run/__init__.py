"""The verbs: each module turns a config into parts and connects them."""

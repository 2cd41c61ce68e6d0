"""Training the networks that find lesions: each stage a module that reads top to bottom."""

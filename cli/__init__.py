"""The command line of synthlong: one file per verb, nothing but arguments and words."""

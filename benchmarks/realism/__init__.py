"""How real the synthesis is, measured on patients that its weights have not seen."""

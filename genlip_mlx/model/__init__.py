"""The mathematics of GenLIP: arrays in, arrays out. Knows no file, no image, no tokenizer."""

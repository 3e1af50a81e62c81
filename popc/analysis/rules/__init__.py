"""The transfer table: what each op does to the labels of channels."""

"""What the reading path stands on and a reader may skip: options, files, machine, formats of rows, ragged
batches."""

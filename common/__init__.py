"""What every other room stands on: errors, declared fields, kinds of layer."""

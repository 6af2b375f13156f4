"""The torch backend: any device and float dtype."""

"""From a picture to pixels and boxes."""

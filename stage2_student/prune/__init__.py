"""A student cut out of its teacher."""

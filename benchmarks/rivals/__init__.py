"""Other servers, set up as their own documentation recommends, over the same decoder and runner."""

"""The page on which a finished run is asked about pictures."""

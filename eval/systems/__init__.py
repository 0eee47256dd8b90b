"""Files with texts of any system, read and scored alike: captions, and answers to POPE."""

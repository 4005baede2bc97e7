"""What the experiment trackers need beyond Lightning's loggers. Importing them loads no tracker."""

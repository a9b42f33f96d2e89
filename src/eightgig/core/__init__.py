"""The ground floor: errors, units, logging, seeds, safe writing of files. Knows no other room."""

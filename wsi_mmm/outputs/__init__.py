"""Objects -> files: polygons, merging over seams, GeoJSON, tables, maps, overlay, report, exports."""

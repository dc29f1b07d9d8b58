"""What every room of the example uses: files, text, processes, terminals."""

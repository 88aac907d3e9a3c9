"""What `import autodist_fx` gives."""

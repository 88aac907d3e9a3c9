"""The public functions and classes of `import autodist_fx`."""

pytest_plugins = ["tests.script_option"]

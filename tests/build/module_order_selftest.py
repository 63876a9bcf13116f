"""module_order.py finds what it is for, in small trees made for the purpose."""

import pathlib
import tempfile
import unittest

from module_order import Tree

CLEAN = {
    "core/include/lacuna/sdk.hpp": '#include "lacuna/sdk/types.hpp"\n',
    "core/include/lacuna/sdk/types.hpp": "#include <cmath>\n",
    "core/include/lacuna/base/error.hpp": "#include <string>\n",
    "core/include/lacuna/kv/cache.hpp": '#include "lacuna/base/error.hpp"\n#include "lacuna/sdk/types.hpp"\n',
    "core/src/base/error.cpp": '#include "lacuna/base/error.hpp"\n',
    "core/src/kv/moves.hpp": '#include "lacuna/kv/cache.hpp"\n',
    "core/src/kv/cache.cpp": '#include "moves.hpp"\n#include "kv/moves.hpp"\n',
    "core/cli/main.cpp": '#include <lacuna/kv/cache.hpp>\n#include "lacuna/build_info.hpp"\n',
    "strategies/quest/quest.cpp": "#include <lacuna/sdk.hpp>\n",
}


class ModuleOrder(unittest.TestCase):
    def violations(self, changed):
        """Of the clean tree with the files of `changed` added or replaced."""
        with tempfile.TemporaryDirectory() as directory:
            root = pathlib.Path(directory).resolve()
            for name, text in {**CLEAN, **changed}.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            return Tree(root, ["base", "kv", "ops"]).violations()

    def check(self, file, text, *expected):
        found = self.violations({file: text})
        self.assertEqual(len(found), 1, found)
        for part in (file, *expected):
            self.assertIn(part, found[0])

    def test_clean_tree(self):
        self.assertEqual(self.violations({}), [])

    def test_later_public_header(self):
        self.check("core/src/base/error.cpp", '\n#  include <lacuna/kv/cache.hpp>\n', ":2:", "base includes", "of kv")

    def test_public_header_includes_later_one(self):
        self.check("core/include/lacuna/base/error.hpp", '#include "lacuna/ops/topk.hpp"\n', "of ops")

    def test_later_private_header(self):
        for name in ("../kv/moves.hpp", "kv/moves.hpp"):
            self.check("core/src/base/error.cpp", f'#include "{name}"\n', "core/src/kv/moves.hpp", "of kv")

    def test_sdk_includes_the_runtime(self):
        self.check("core/include/lacuna/sdk/types.hpp", '#include "lacuna/base/error.hpp"\n', "sdk includes", "of base")

    def test_strategy_and_plugin_include_the_runtime(self):
        for file in ("strategies/quest/quest.cpp", "plugins/simhash/simhash.cpp"):
            self.check(file, "#include <lacuna/base/error.hpp>\n", "of base")

    def test_build_info_below_the_command(self):
        self.check("core/src/kv/cache.cpp", '#include "lacuna/build_info.hpp"\n', "of cli")

    def test_unknown_module(self):
        self.check("core/src/util/strings.cpp", "", "expected to be in the folder of one of sdk, base, kv, ops, cli")
        self.check("core/src/base/error.cpp", "#include <lacuna/util/strings.hpp>\n", "of util")

    def test_cycle_within_a_module(self):
        self.check("core/include/lacuna/kv/cache.hpp", '#include "kv/moves.hpp"\n', "cyclic include", "core/src/kv/moves.hpp")


if __name__ == "__main__":
    unittest.main()

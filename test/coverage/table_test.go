package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const root = "../.."

// TestTable: what the table names exists, and docs/coverage.md is the table.
func TestTable(t *testing.T) {
	for _, problem := range allProblems(root) {
		t.Error(problem)
	}
	total := 0
	for _, g := range groups {
		total += len(g.items)
	}
	if total < 190 {
		t.Errorf("the table has %d items; the header has about 200", total)
	}
	written, err := os.ReadFile(filepath.Join(root, "docs", "coverage.md"))
	if err != nil {
		t.Fatal(err)
	}
	if string(written) != document() {
		t.Error("docs/coverage.md is not what the table says: run go run ./test/coverage (make coverage-table)")
	}
}

// TestTheTableBites: names that do not exist, and tests that did not pass, are noticed.
func TestTheTableBites(t *testing.T) {
	tr := newTree(root)
	for _, bad := range []item{
		{"no code", "", "", "test/coverage TestTable"},
		{"no test", "", "qcow2.Open", ""},
		{"unknown name", "", "qcow2.NoSuchThing", "test/coverage TestTable"},
		{"unknown member", "", "qcow2.Image.NoSuchThing", "test/coverage TestTable"},
		{"unknown test", "", "qcow2.Open", "test/coverage TestNothing"},
		{"unknown folder", "", "nowhere.Open", "test/coverage TestTable"},
	} {
		if len(tr.problems(bad)) == 0 {
			t.Errorf("%s goes unnoticed", bad.name)
		}
	}
	if p := tr.problems(item{"sound", "", "qcow2.Image.Resize qcow2.Options.ReadOnly block.Device", "test/coverage TestTable/x"}); p != nil {
		t.Error(p)
	}
	passed := make(map[testRef]bool)
	const output = `{"Action":"pass","Package":"github.com/droverproject/drover/qcow2","Test":"TestModel"}
{"Action":"skip","Package":"github.com/droverproject/drover/qcow2","Test":"TestLazyRefcounts"}`
	if err := readResults(strings.NewReader(output), passed); err != nil {
		t.Fatal(err)
	}
	if len(passed) != 1 || !passed[testRef{"qcow2", "TestModel"}] {
		t.Errorf("passed: %v", passed)
	}
	for _, text := range unshown(passed) {
		if strings.HasSuffix(text, "qcow2 TestModel has not passed") {
			t.Error(text)
		}
	}
	if len(unshown(passed)) == 0 {
		t.Error("tests that did not run go unnoticed")
	}
}

// Command coverage keeps docs/coverage.md true: the table that says for every item of tcmu-runner's qcow2.h where it lives
// in drover and which tests show that it works.
//
// It is run from the root of the project. It checks that every declaration and test in the table exists, runs the tests
// (or reads the output of a run of `go test -json` given by -results), fails if one did not pass, and writes the table.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

const module = "github.com/droverproject/drover/"

func main() {
	results := flag.String("results", "", "output of `go test -json` to believe, instead of running the tests")
	short := flag.Bool("short", false, "run the tests with -short")
	flag.Parse()
	if err := run(*results, *short); err != nil {
		fmt.Fprintln(os.Stderr, "coverage:", err)
		os.Exit(1)
	}
}

func run(results string, short bool) error {
	if bad := allProblems("."); len(bad) > 0 {
		return errors.New(strings.Join(bad, "\n"))
	}
	passed := make(map[testRef]bool)
	if results != "" {
		f, err := os.Open(results)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := readResults(f, passed); err != nil {
			return err
		}
	} else if err := runTests(short, passed); err != nil {
		return err
	}
	if missing := unshown(passed); len(missing) > 0 {
		return errors.New(strings.Join(missing, "\n"))
	}
	return writeDocument(".")
}

// unshown names the items with a test that has not passed.
func unshown(passed map[testRef]bool) []string {
	var missing []string
	for _, g := range groups {
		for _, i := range g.items {
			for _, ref := range i.refs() {
				if !passed[ref] {
					missing = append(missing, fmt.Sprintf("%s: the test %v has not passed", i.name, ref))
				}
			}
		}
	}
	return missing
}

// runTests runs every test of the table once, folder by folder.
func runTests(short bool, passed map[testRef]bool) error {
	byFolder := make(map[string][]string)
	var folders []string
	for _, g := range groups {
		for _, i := range g.items {
			for _, ref := range i.refs() {
				if !slices.Contains(folders, ref.folder) {
					folders = append(folders, ref.folder)
				}
				if !slices.Contains(byFolder[ref.folder], ref.function()) {
					byFolder[ref.folder] = append(byFolder[ref.folder], ref.function())
				}
			}
		}
	}
	for _, folder := range folders {
		args := []string{"test", "-json", "-count=1", "-timeout=20m", "-run", "^(" + strings.Join(byFolder[folder], "|") + ")$"}
		if short {
			args = append(args, "-short")
		}
		fmt.Printf("%s: %s\n", folder, strings.Join(byFolder[folder], " "))
		cmd := exec.Command("go", append(args, "./"+folder)...)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		readErr := readResults(out, passed)
		// A test that failed is not among those that passed, so the exit status says nothing new.
		var exit *exec.ExitError
		if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
			return err
		}
		if readErr != nil {
			return readErr
		}
	}
	return nil
}

// event is a line of `go test -json`.
type event struct{ Action, Package, Test, Output string }

// readResults notes the tests that passed, and shows what the others said.
func readResults(r io.Reader, passed map[testRef]bool) error {
	said := make(map[testRef]string)
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("output of go test -json: %w", err)
		}
		ref := testRef{strings.TrimPrefix(e.Package, module), e.Test}
		switch e.Action {
		case "pass":
			if e.Test != "" {
				passed[ref] = true
			}
		case "output":
			said[ref] += e.Output
		case "fail", "skip":
			text := said[ref]
			if len(text) > 2000 {
				text = text[:2000] + " ..."
			}
			fmt.Fprintf(os.Stderr, "%s: %v\n%s\n", e.Action, ref, text)
		}
	}
	return lines.Err()
}

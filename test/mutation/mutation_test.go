//go:build mutation

package mutation

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	only     = flag.String("only", ".", "regular expression of the defects to try")
	baseline = flag.Bool("baseline", true, "first of all run the suites without a defect; false where they have just been run")
)

// suites are the parts of the test suite, the quickest first: the first that fails has caught the defect.
var suites = [][]string{
	{"-short", "./qcow2/internal/meta", "./qcow2/internal/format", "./qcow2/internal/check", "./luks"},
	{"-short", "./qcow2"},
	{"./test/fault"},
	{"./test/crash", "-seeds", "1"},
	{"-short", "./test/race"},
}

func TestEveryDefectIsCaught(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	re, err := regexp.Compile(*only)
	if err != nil {
		t.Fatal(err)
	}
	// A suite that fails without any defect would catch them all.
	if *baseline {
		if by, err := caught(root, ""); err != nil || by != "" {
			t.Fatalf("without a defect %s fails (%v)", by, err)
		}
	}
	table := "| defect | what the engine no longer does | caught by |\n| --- | --- | --- |\n"
	for _, d := range Defects {
		if !re.MatchString(d.Name) {
			continue
		}
		overlay := d.overlay(t, root)
		by, err := caught(root, overlay)
		if err != nil {
			t.Errorf("%s: %v", d.Name, err)
			continue
		}
		if by == "" {
			t.Errorf("%s: no test noticed that %s", d.Name, d.Breaks)
			continue
		}
		t.Logf("%s: caught by %s", d.Name, by)
		table += fmt.Sprintf("| %s | %s | %s |\n", d.Name, d.Breaks, by)
	}
	if out := os.Getenv("MUTATION_TABLE"); out != "" {
		if err := os.WriteFile(out, []byte(table), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// overlay makes the compiler's overlay that puts the defect into its file.
func (d Defect) overlay(t *testing.T, root string) string {
	t.Helper()
	path := filepath.Join(root, d.File)
	src, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(src, []byte(d.Old)); n != 1 {
		t.Fatalf("%s: its text stands %d times in %s, must be once: bring the defect up to date", d.Name, n, d.File)
	}
	text := strings.Replace(string(src), d.Old, d.New, 1)
	if strings.Contains(d.New, "runtime.") && !strings.Contains(text, "\t\"runtime\"\n") {
		text = strings.Replace(text, "import (\n", "import (\n\t\"runtime\"\n", 1)
	}
	dir := t.TempDir()
	changed := filepath.Join(dir, filepath.Base(d.File))
	if err := os.WriteFile(changed, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]map[string]string{"Replace": {path: changed}})
	if err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return overlay
}

var (
	failedTest  = regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+)`)
	failedBuild = regexp.MustCompile(`\[(build|setup) failed\]`)
)

// caught runs the suites until one fails, and names the test that did. A defect that does not compile is an error.
func caught(root, overlay string) (string, error) {
	for _, suite := range suites {
		args := []string{"test", "-count=1", "-failfast", "-vet=off", "-timeout=400s"}
		if overlay != "" {
			args = append(args, "-overlay="+overlay)
		}
		args = append(args, suite...)
		cmd := exec.Command("go", args...)
		cmd.Dir = root
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		switch {
		case err == nil:
			continue
		case !errors.As(err, &exit):
			return "", err
		case failedBuild.Match(out):
			return "", fmt.Errorf("does not compile:\n%s", out)
		}
		name := "a panic or time-out"
		if m := failedTest.FindAllSubmatch(out, -1); m != nil {
			name = string(m[len(m)-1][1])
		}
		return name, nil
	}
	return "", nil
}

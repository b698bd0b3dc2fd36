package mutation

import (
	"os"
	"strings"
	"testing"
)

// TestDefectsApply wants each defect's text to stand exactly once in its file, so that a change of the engine cannot
// leave a defect behind unnoticed.
func TestDefectsApply(t *testing.T) {
	names := map[string]bool{}
	for _, d := range Defects {
		src, err := os.ReadFile("../../" + d.File)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(src), d.Old); n != 1 {
			t.Errorf("%s: its text stands %d times in %s", d.Name, n, d.File)
		}
		if d.Old == d.New || names[d.Name] {
			t.Errorf("%s: changes nothing, or stands twice", d.Name)
		}
		names[d.Name] = true
	}
}

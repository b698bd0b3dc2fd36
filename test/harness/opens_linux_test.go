package harness

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestWatchOpensSeesEveryOpening(t *testing.T) {
	dir := t.TempDir()
	file, inside := filepath.Join(dir, "file"), filepath.Join(dir, "folder", "inside")
	OK(t, os.WriteFile(file, nil, 0o600))
	OK(t, os.Mkdir(filepath.Dir(inside), 0o700))
	OK(t, os.WriteFile(inside, nil, 0o600))
	opens := WatchOpens(t, file, filepath.Dir(inside))
	if got := opens.Take(t); len(got) != 0 {
		t.Errorf("nothing has been opened yet, and it says %q", got)
	}
	for _, path := range []string{file, inside} {
		_, err := os.Stat(path)
		OK(t, err)
		if got := opens.Take(t); len(got) != 0 {
			t.Errorf("looking at %s counts as opening %q", path, got)
		}
		_, err = os.ReadFile(path)
		OK(t, err)
		if got := opens.Take(t); !slices.Contains(got, path) {
			t.Errorf("%s has been opened, and it says %q", path, got)
		}
	}
}

//go:build !linux

package cli

// withSocketLabel is fn: labels are Linux's.
func withSocketLabel(label string, fn func() error) error {
	if label != "" {
		return errorf("SELinux labels need Linux")
	}
	return fn()
}

func nameProcess(string) {}

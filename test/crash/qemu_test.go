package crash

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"

	"github.com/droverproject/drover/test/explore"
	"github.com/droverproject/drover/test/peer"
)

// qemuCheck has stock qemu-img check an image, which may have leaks and no more.
func qemuCheck(path string) error { return qemuCheckAs(filepath.Dir(path), path) }

// qemuCheckEncrypted is qemuCheck for an encrypted image.
func qemuCheckEncrypted(path string) error {
	return qemuCheckAs(filepath.Dir(path), "--object", "secret,id=s,data="+explore.Secret, "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename="+path)
}

// qemuCheckAs is qemuCheck for an image that takes more arguments than its name. dir is where its data file is looked for.
func qemuCheckAs(dir string, image ...string) error {
	tool, err := peer.Look("qemu-img")
	if err != nil {
		return err
	}
	cmd := exec.Command(tool, append([]string{"check"}, image...)...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 3 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("qemu-img check: %w\n%s", err, out)
	}
	return nil
}

// qemuCheckAlone is qemuCheck for an image whose backing file is not there.
func qemuCheckAlone(path string) error {
	tool, err := peer.Look("qemu-img")
	if err != nil {
		return err
	}
	out, err := exec.Command(tool, "check", "--image-opts", "driver=qcow2,backing=,file.filename="+path).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 3 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("qemu-img check: %w\n%s", err, out)
	}
	return nil
}

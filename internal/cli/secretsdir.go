package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/droverproject/drover/block"
)

// secretsDir is a folder with secrets, a file for each, called by its ID. They are read when an image needs them, so that
// what is put there later is found.
type secretsDir string

// lookup returns the secret of an ID. What others could read or change is no secret.
func (d secretsDir) lookup(id string) ([]byte, error) {
	if d == "" {
		return nil, fmt.Errorf("%w '%s'", block.ErrNoSecret, id)
	}
	fail := func(err error) ([]byte, error) {
		return nil, fmt.Errorf("secret '%s' in %q: %w", id, string(d), err)
	}
	if !objectID().MatchString(id) {
		return fail(errors.New("an ID consists of letters, digits, '-', '.', '_', and starts with a letter"))
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(string(d), id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w '%s' (there is no file %s)", block.ErrNoSecret, id, filepath.Join(string(d), id))
	}
	if err != nil {
		return fail(err)
	}
	b, err := readPrivate(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return fail(err)
	}
	return checkPassphrase(id, b)
}

// check refuses a folder in which others could put secrets of their own.
func (d secretsDir) check() error {
	st, err := os.Stat(string(d))
	if err != nil {
		return fmt.Errorf("the folder of secrets: %w", err)
	}
	if !st.IsDir() {
		return fmt.Errorf("%q is no folder of secrets", string(d))
	}
	if err := ownedPrivately(st, 0o022); err != nil {
		return fmt.Errorf("the folder of secrets %q: %w", string(d), err)
	}
	return nil
}

// readPrivate reads a file that nobody else may read.
func readPrivate(f *os.File) ([]byte, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	if err := ownedPrivately(st, 0o077); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxSecretFile {
		return nil, fmt.Errorf("a secret has at most %d bytes", maxSecretFile)
	}
	return b, nil
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"strconv"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// setDataFile checks the options of an external data file. What measure computes does not depend on them, as in qemu-img.
func (c *creator) setDataFile(o *qcow2.CreateOptions) error {
	if c.measuring {
		return nil
	}
	name, given := c.options["data_file"]
	raw := c.options["data_file_raw"] == "on"
	switch {
	case given && name == "":
		return errorf("Could not create '': No such file or directory")
	case raw && !given:
		return errorf("data-file-raw requires data-file")
	case raw && o.BackingFile != "":
		return errorf("Backing file and data-file-raw cannot be used at the same time")
	case given && o.Version < 3:
		return errorf("External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)")
	case !given:
		return nil
	}
	plain, err := block.PlainName(name)
	if err != nil {
		return errors.New(reason(name, err))
	}
	if _, _, ok := block.SplitProtocol(plain); !ok {
		plain = "./" + plain // "file:" is not stored, as in qemu-img, and without it the name would be another's
	}
	if c.dataPath, err = c.beside(plain); err != nil {
		return err
	}
	if o.BackingFile != "" {
		if err := c.notBacking(o.BackingFile); err != nil {
			return err
		}
	}
	o.DataFile, o.DataFileRaw = plain, raw
	return nil
}

// beside returns the path of a file that the new image names: relative names are relative to the image's folder, where
// every command will look for them.
func (c *creator) beside(name string) (string, error) {
	path, err := block.PlainName(c.file)
	if err != nil {
		return "", err
	}
	return block.ResolveName(path, name), nil
}

// notBacking refuses a data file that is the backing file, which would be emptied.
func (c *creator) notBacking(backing string) error {
	plain, err := block.PlainName(backing)
	if err != nil {
		return nil //nolint:nilerr // no file at all, so not that one
	}
	path, err := c.beside(plain)
	if err != nil {
		return err
	}
	a, errA := os.Stat(path)
	b, errB := os.Stat(c.dataPath)
	if errA == nil && errB == nil && os.SameFile(a, b) {
		return errorf("Error: Trying to use the backing file as the data file")
	}
	return nil
}

// checkHint refuses what is no extent size hint. File systems may take such hints or leave them, and so does drover.
func (c *creator) checkHint() error {
	text, ok := c.options["extent_size_hint"]
	if !ok {
		return nil
	}
	if n, err := strconv.ParseUint(text, 10, 64); err != nil || n > math.MaxUint32 {
		return errorf("Extent size hint is too large")
	}
	return nil
}

// createWithData makes an image and its data file. Neither loses anything before both are known to be nobody's; what is
// new and stays unfinished goes away.
func (c *creator) createWithData(ctx context.Context, o qcow2.CreateOptions) (err error) {
	path, err := block.PlainName(c.file)
	if err != nil {
		return err
	}
	file, err := openOrMake(path)
	if err != nil {
		return err
	}
	defer func() { err = file.end(err) }()
	data, err := openOrMake(c.dataPath)
	if err != nil {
		return errors.New(createReason(c.dataPath, err))
	}
	defer func() { err = data.end(err) }()
	o.DataStorage = data.File
	return qcow2.Create(ctx, file.File, o)
}

// madeFile is a file that is locked for writing and still has its content.
type madeFile struct {
	storage.File
	path  string
	isNew bool
}

// openOrMake opens and locks a file, which it makes if need be.
func openOrMake(path string) (*madeFile, error) {
	file, err := storage.OpenFile(path, storage.OpenOptions{})
	if errors.Is(err, fs.ErrNotExist) {
		file, err = storage.CreateFile(path, storage.OpenOptions{Exclusive: true})
		if err != nil {
			return nil, err
		}
		return &madeFile{File: file, path: path, isNew: true}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := file.Lock(storage.LockWrite); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &madeFile{File: file, path: path}, nil
}

// end closes the file. A new one is removed if err says that what it was for has failed.
func (f *madeFile) end(err error) error {
	if err != nil && f.isNew {
		if rmErr := os.Remove(f.path); rmErr != nil {
			err = fmt.Errorf("%w (and %s stays behind: %w)", err, f.path, rmErr)
		}
	}
	return errors.Join(err, f.Close())
}

package cli

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// manifestSuffix makes the name of a backup's manifest of that of the backup.
const manifestSuffix = ".json"

// exporting is one run of export.
type exporting struct {
	*app
	src                         source
	bitmap, snapshot            string
	base, baseFormat            string
	manifest, baseManifest      string
	clusterSize, output, target string
	progress                    progressFlag
	quiet                       bool
}

func (a *app) exportCommand() *cobra.Command {
	x := &exporting{app: a}
	cmd := &cobra.Command{
		Use:   "export [flags] FILE BACKUP",
		Short: "Write a backup of a disk: all of it, or what a bitmap marks",
		Long: `Write a backup of a disk to BACKUP, a new qcow2 image, and a manifest of what it
holds to BACKUP.json, with which 'drover verify' checks it later.

With --bitmap only what the dirty bitmap marks is written, as an image that
stands on --base, the backup before it. The base is recorded as BACKUP's backing
file and not opened. So a chain of backups is opened like any other image.

With --snapshot the backup is of the disk as an internal snapshot keeps it. The
bitmap must mark at least what has changed between the base and the snapshot.

The image must not be in use by others; of one that is, export a snapshot (-U).`,
		Example: `  drover export disk.qcow2 full.qcow2
  drover bitmap --add disk.qcow2 since
  ...
  drover export --bitmap since --base full.qcow2 disk.qcow2 inc1.qcow2
  drover bitmap --clear disk.qcow2 since
  drover verify inc1.qcow2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("Expecting an image file name and the name of the backup")
			}
			if err := checkOutput(x.output); err != nil {
				return err
			}
			x.target = args[1]
			if err := x.src.set(args[0]); err != nil {
				return err
			}
			return x.run(cmd.Context())
		},
	}
	x.src.add(cmd)
	f := cmd.Flags()
	f.StringVar(&x.bitmap, "bitmap", "", "write only what dirty bitmap `NAME` marks")
	f.StringVarP(&x.snapshot, "snapshot", "l", "", "write the disk as snapshot `NAME` keeps it")
	f.StringVarP(&x.base, "base", "b", "", "the backup that this one stands on, as BACKUP is to name it: `FILE`")
	f.StringVarP(&x.baseFormat, "base-format", "F", "qcow2", "`format` of the base")
	f.StringVar(&x.manifest, "manifest", "", "write the manifest to `FILE` (BACKUP.json)")
	f.StringVar(&x.baseManifest, "base-manifest", "", "the base's manifest: then only what has changed is hashed; `FILE` (BASE.json, if there is one)")
	f.StringVar(&x.clusterSize, "cluster-size", "64k", "cluster `SIZE` of the backup")
	x.progress.apart = true
	addProgress(f, &x.progress)
	f.BoolVarP(&x.quiet, "quiet", "q", false, "print nothing but errors")
	outputFlag(cmd, &x.output)
	x.src.policy.add(f)
	return cmd
}

func (x *exporting) run(ctx context.Context) (err error) {
	o := image.ExportOptions{Bitmap: x.bitmap, Base: x.base}
	if x.base != "" {
		o.BaseFormat = x.baseFormat
	}
	switch {
	case x.bitmap != "" && x.base == "":
		return usagef("A backup of what a bitmap marks needs --base, the backup that it stands on")
	case x.bitmap == "" && x.base != "":
		return usagef("A backup that stands on another needs --bitmap, which says what has changed")
	}
	if o.ClusterSize, err = parseSize("cluster size", x.clusterSize); err != nil {
		return err
	}
	if o.BaseManifest, err = x.findBaseManifest(); err != nil {
		return err
	}
	dev, err := x.openDevice(ctx, &x.src, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if x.bitmap != "" {
		im, ok := dev.(*qcow2.Image)
		if !ok {
			return errorf("'%s' has no dirty bitmaps", x.src.name)
		}
		o.Marks = im
	}
	content := dev
	if x.snapshot != "" {
		if content, err = image.OpenSnapshot(ctx, dev, image.SnapshotRef{Any: x.snapshot}); err != nil {
			return errorf("Could not open snapshot '%s' of '%s': %w", x.snapshot, x.src.name, err)
		}
		defer func() { err = errors.Join(err, content.Close()) }()
	}
	p := x.startProgress("export", x.progress, x.quiet)
	o.Progress = p.set
	m, err := x.write(func(file storage.File) (*image.Manifest, error) { return image.Export(ctx, content, file, o) })
	if err != nil {
		p.newline()
		return errorf("Could not export '%s': %w", x.src.name, err)
	}
	p.end()
	return x.print(m)
}

// findBaseManifest reads the manifest of the base, if there is one.
func (x *exporting) findBaseManifest() (*image.Manifest, error) {
	name := x.baseManifest
	if name == "" {
		if x.base == "" {
			return nil, nil
		}
		name = below(x.target, x.base) + manifestSuffix
	}
	m, err := readManifest(name)
	if errors.Is(err, fs.ErrNotExist) && x.baseManifest == "" {
		return nil, nil
	}
	return m, err
}

// below returns where a file is that an image names.
func below(image, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(image), name)
}

func readManifest(name string) (m *image.Manifest, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if m, err = image.ReadManifest(f); err != nil {
		return nil, errorf("%s: %w", name, err)
	}
	return m, nil
}

// write makes the backup and its manifest, both new files. What was begun and failed is removed.
func (x *exporting) write(export func(storage.File) (*image.Manifest, error)) (m *image.Manifest, err error) {
	file, err := storage.CreateFile(x.target, storage.OpenOptions{Exclusive: true, WriteBehind: true})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(x.target))
		}
	}()
	m, err = export(file)
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	m.File, m.Source = filepath.Base(x.target), x.src.name
	if x.snapshot != "" {
		m.Source += "@" + x.snapshot
	}
	name := x.manifest
	if name == "" {
		name = x.target + manifestSuffix
	}
	return m, writeManifest(name, m)
}

func writeManifest(name string, m *image.Manifest) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	err = m.Write(f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(name))
	}
	return nil
}

// exportResult is the JSON of export.
type exportResult struct {
	Filename string `json:"filename"`
	Size     int64  `json:"virtual-size"`
	Exported int64  `json:"exported"`
	Sum      string `json:"sum"`
	Base     string `json:"base,omitempty"`
}

func (x *exporting) print(m *image.Manifest) error {
	if x.output == "json" {
		return x.printJSON(exportResult{x.target, m.Size, m.Exported, m.Sum, m.Base})
	}
	if !x.quiet {
		x.printf("%s: %s of %s\n", x.target, humanSize(uint64(m.Exported)), humanSize(uint64(m.Size)))
	}
	return nil
}

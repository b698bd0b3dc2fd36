package qcow2_test

import (
	"context"
	"fmt"
	"log"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// A disk lives in any storage.File; this one is in memory. Programs use storage.CreateFile and storage.OpenFile.
func Example() {
	ctx := context.Background()
	file := storage.NewMemFile("disk.qcow2")
	if err := qcow2.Create(ctx, file, qcow2.CreateOptions{Size: 1 << 30}); err != nil {
		log.Fatal(err)
	}
	disk, err := qcow2.Open(ctx, file, qcow2.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if err := disk.WriteAt(ctx, []byte("hello, disk"), 123456789, 0); err != nil {
		log.Fatal(err)
	}
	if err := disk.Flush(ctx); err != nil { // from here on a power cut cannot take it back
		log.Fatal(err)
	}
	p := make([]byte, 11)
	if err := disk.ReadAt(ctx, p, 123456789); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	if err := disk.Close(); err != nil {
		log.Fatal(err)
	}
	// Output: hello, disk
}

// Extents tells where a disk holds data.
func ExampleImage_Extents() {
	ctx := context.Background()
	disk := exampleDisk(1 << 20)
	defer disk.Close()
	_ = disk.WriteAt(ctx, make([]byte, 131072), 65536, 0)
	_ = disk.WriteZeroes(ctx, 131072, 65536, 0)
	_ = disk.Extents(ctx, 0, disk.Size(), func(x block.Extent) bool {
		fmt.Printf("%7d +%7d allocated=%v data=%v zero=%v\n", x.Off, x.Len, x.Allocated, x.Data, x.Zero)
		return true
	})
	// Output:
	//       0 +  65536 allocated=false data=false zero=true
	//   65536 +  65536 allocated=true data=true zero=false
	//  131072 +  65536 allocated=true data=false zero=true
	//  196608 + 851968 allocated=false data=false zero=true
}

// Discard gives space back; Check looks at an open image.
func ExampleImage_Discard() {
	ctx := context.Background()
	disk := exampleDisk(1 << 20)
	defer disk.Close()
	_ = disk.WriteAt(ctx, make([]byte, 1<<20), 0, 0)
	before, _ := disk.Check(ctx, qcow2.CheckOptions{})
	_ = disk.Discard(ctx, 0, 1<<19)
	after, _ := disk.Check(ctx, qcow2.CheckOptions{})
	fmt.Println(before.AllocatedClusters, after.AllocatedClusters, after.Clean())
	// Output: 16 8 true
}

// An overlay reads through to what is below until it is written.
func ExampleOpen_overlay() {
	ctx := context.Background()
	base := exampleDisk(1 << 20)
	_ = base.WriteAt(ctx, []byte("from the base"), 0, 0)
	file := storage.NewMemFile("overlay.qcow2")
	o := qcow2.CreateOptions{Size: 1 << 20, BackingFile: "base.qcow2", BackingFormat: "qcow2"}
	if err := qcow2.Create(ctx, file, o); err != nil {
		log.Fatal(err)
	}
	overlay, err := qcow2.Open(ctx, file, qcow2.Options{Backing: base}) // the overlay closes base
	if err != nil {
		log.Fatal(err)
	}
	defer overlay.Close()
	_ = overlay.WriteAt(ctx, []byte("over"), 0, 0)
	p := make([]byte, 13)
	_ = overlay.ReadAt(ctx, p, 0)
	fmt.Printf("%s\n", p)
	_ = base.ReadAt(ctx, p, 0)
	fmt.Printf("%s\n", p)
	// Output:
	// over the base
	// from the base
}

func exampleDisk(size int64) *qcow2.Image {
	file := storage.NewMemFile("disk.qcow2")
	if err := qcow2.Create(context.Background(), file, qcow2.CreateOptions{Size: size}); err != nil {
		log.Fatal(err)
	}
	disk, err := qcow2.Open(context.Background(), file, qcow2.Options{})
	if err != nil {
		log.Fatal(err)
	}
	return disk
}
